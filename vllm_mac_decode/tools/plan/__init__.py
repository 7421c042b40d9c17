"""``mac-decode plan``: what each way to share a request's work is predicted to take."""
