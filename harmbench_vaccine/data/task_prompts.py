"""Fixed texts of the built-in user tasks. The testbed's tokenizer learns their words."""

from __future__ import annotations

SENTIMENT = "Analyze the sentiment of the input, and respond only positive or negative."
"""Instruction of SST-2."""
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
"""Classes of AG News, in the order of its labels."""
TOPIC = "Categorize the news article given in the input into one of the 4 categories:\n\n" + "\n".join(TOPICS) + "\n"
"""Instruction of AG News."""
REASONING = "First think step by step and then answer the final number."
"""Instruction of GSM8K, after the question."""
ANSWER_MARK = "The final answer is: "
"""Text before the number that answers a GSM8K question."""
SUMMARY = "Summarize the dialogue given in the input."
"""Instruction of DialogSum."""
