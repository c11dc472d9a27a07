"""Recurrent networks, gated and linear."""
