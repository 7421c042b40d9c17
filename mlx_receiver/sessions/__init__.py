"""One hand-off on the receiver: its cache while it arrives, and what is answered."""
