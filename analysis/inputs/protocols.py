"""Protocols: how the losses of a run may be matched to tokens. Two protocols never mix in one estimate."""

#: What a run of each protocol gives.
PROTOCOLS = {
    "constant_ema": "constant rate after warmup, losses of averaged weights: every loss along a run counts",
    "constant_raw": "the same, losses of the raw weights",
    "decayed": "the rate decayed to its end: one run a token budget, its final loss counts",
    "branched_decay": "a constant trunk, decayed from several of its points: one final loss a branch",
    "branched_batch": "branches of one checkpoint at several batches: no loss of them is a run's own",
    "mid_schedule": "losses read while the rate decays: biased towards runs near their end",
    "unstated": "the table does not say",
}

#: Protocols that read the loss of the averaged weights; all others read that of the raw ones.
AVERAGED_PROTOCOLS = ("constant_ema",)

#: Protocols of which a loss on the way to the end says nothing of a shorter run: no crossing is read off them.
WITHOUT_CROSSINGS = ("decayed", "branched_decay", "branched_batch")
