"""The engine core's process: plans, blocks, admission and the scheduler of compressed requests."""
