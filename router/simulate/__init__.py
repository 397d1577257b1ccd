"""A fleet in virtual time, with the real score, bookings and block arithmetic."""
