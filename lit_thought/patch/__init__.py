"""The thought patch: the change and its provenance (``change``, ``provenance``), what puts it on a model (``weights``),
its file forms (adapter, card, results, hub, exports), and on top of them all the class that users have (``patch``)."""
