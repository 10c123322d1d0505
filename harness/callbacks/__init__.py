"""Callbacks, one file a duty. They act at optimizer steps, never in the middle of an accumulated batch."""
