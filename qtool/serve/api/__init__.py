"""The APIs that clients speak: requests, answers, tools."""
