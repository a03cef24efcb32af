"""The typed configuration: what every value is and where its default comes from."""
