"""One script per contender, all speaking the protocol of ``protocol.py``, each run by its contender's own Python."""
