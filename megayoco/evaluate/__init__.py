"""What a trained model can do: retrieval in long texts, and loss by position. python -m megayoco.evaluate NAME ...

    evaluations.py   the table of evaluations: name, options, module
    needle.py, multi_needle.py, passkey.py    the prompts of each retrieval evaluation
    cases.py         what they share: prompts of an exact length; haystack.py: the text around the needles
    retrieval.py     asks the model; prefix.py: what prompts have in common is read once
    perplexity.py    loss by position; documents.py: the documents it reads
    harness.py       lm-evaluation-harness
    work.py          items over replicas, resumed after an interruption
    subject.py       what is known of the model
    results.py       the folder of results; plots.py: its pictures
    flags.py, __main__.py    the command line

Every evaluation is a function `run(model, tokenizer, options, output=None, progress=None, subject=Subject())` that
returns flat scalars, and leaves random states and everything else of the process as they were.
"""
