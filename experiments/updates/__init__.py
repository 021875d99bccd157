"""Bytes and scores of update files for the variants of one base."""
