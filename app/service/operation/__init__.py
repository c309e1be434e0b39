"""What an operator sees of the service and asks of it: readiness, logs, drift, a challenger on live drawings."""
