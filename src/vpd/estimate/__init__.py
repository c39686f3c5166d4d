"""What a run would need, computed without weights: memory by item, seconds by phase, tokens and money.

``architecture`` makes the model's modules without data, ``memory`` counts what they and the update's real code would
hold, ``work`` counts operations and bytes, ``settings`` holds the assumptions about the machine.
"""
