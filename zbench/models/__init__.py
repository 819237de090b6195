"""The runtime: rows in, one forward, logits out; the cache it writes; what it costs."""
