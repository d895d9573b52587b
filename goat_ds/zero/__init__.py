"""The shards: everything that knows DeepSpeed. The only room that imports it."""
