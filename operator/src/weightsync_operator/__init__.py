"""The operator: it watches, keeps what it saw in a store, decides by pure functions and acts."""
