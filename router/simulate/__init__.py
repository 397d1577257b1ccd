"""A fleet in virtual time: the real score and bookings over replicas with real block accounting."""
