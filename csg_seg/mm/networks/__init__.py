"""Networks and heads that the mm libraries lack."""
