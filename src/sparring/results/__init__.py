"""Results on disk: one format, one reader, one comparison, the gate."""
