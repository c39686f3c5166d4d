"""What a run leaves behind and shows: metrics, rollouts, a console table, curves."""
