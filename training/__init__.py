# SPDX-License-Identifier: Apache-2.0
"""How the bundled model was made: text, tokenizer, training, bigram baseline, export."""
