"""Decide how many bits each site gets: tables in, a plan out.

In come a sensitivity table and a target size; out comes a plan. Everything here is a pure function of tables, which are
immutable: no model, no graph, no tensor. It may import ``fmpq_fx.storage``, to save tables as JSON.
"""
