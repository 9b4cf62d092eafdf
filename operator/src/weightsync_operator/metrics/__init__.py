"""What Prometheus is told. `table`: every name; `meter`: what is counted; `collector`: what is read at a scrape."""
