"""The Lightning side: module, callback, data module, strategy; one call around them, and settings chosen by it."""
