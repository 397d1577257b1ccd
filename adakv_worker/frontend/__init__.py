"""The front end process: checks requests, sends them to the engine core, moves them elsewhere."""
