"""The few recurrences under all mixers: no parameters, layout B T H K, state S (B H K V), float32 at least."""
