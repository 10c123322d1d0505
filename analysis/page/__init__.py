"""What is shown: figures, captions, answers in words, the report."""
