"""One file for each kind of cache, and the memory that caches take."""
