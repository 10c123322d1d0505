"""What of a configuration is no part of a run's identity. Imports nothing: tables are read without configurations."""

#: Raised whenever a change of the code changes the numbers that a run gives.
SCIENCE_VERSION = 1

#: What changes no number, by section: a name of a shape, places of files, limits that only refuse.
NOT_SCIENCE = {
    "model": {"preset"},
    "corpus": {"paths", "tokenizer_path", "max_tokens", "max_epochs"},
    "schedule": {"max_warmup_share"},
    "optimizer": {"state_numbers_each"},
}

#: The same of the run itself: what else it writes down.
NOT_SCIENCE_OF_RUN = {"keep_at_tokens", "diagnostics"}
