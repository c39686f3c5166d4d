"""All that knows the insides of a transformers model.

``loading`` reads one, ``probe`` finds which fast paths give its own numbers.  From examples to losses: ``batch``,
``packing`` (rows that share a prefix), ``attention`` and ``forward`` (hidden states), ``head`` (logits, a few tokens at
a time), ``scorer`` (log-probs and divergences), ``roles`` (whose logits are the student's and the teacher's).
``decoding`` samples, ``lora`` trains adapters.
"""
