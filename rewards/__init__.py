"""Verifiers and the service that runs them. Verifier processes import this package: it stays empty."""
