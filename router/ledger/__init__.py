"""The ledger of live occupancy in Redis: its schema, writer, reader and subscription."""
