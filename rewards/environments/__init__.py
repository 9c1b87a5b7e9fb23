"""Environments: what answers the policy between its turns, in processes of their own."""
