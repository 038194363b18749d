"""Other people's models on these operations. Each module needs a library of its own, and nothing else imports it."""
