"""SHA256 of LLaMA's original weight files, as the Chinese-LLaMA-Alpaca project published them.

Source: https://github.com/ymcui/Chinese-LLaMA-Alpaca, SHA256.md. There is none for the 65B model.
"""

_ORIGINALS = {
    "700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d": "LLaMA 7B, file 1 of 1",
    "745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08": "LLaMA 13B, file 1 of 2",
    "d5ccbcc465c71c0de439a5aeffebe8344c68a519bce70bc7f9f92654ee567085": "LLaMA 13B, file 2 of 2",
    "e23294a58552d8cdec5b7e8abb87993b97ea6eced4178ff2697c02472539d067": "LLaMA 33B, file 1 of 4",
    "4e077b7136c7ae2302e954860cf64930458d3076fcde9443f4d0e939e95903ff": "LLaMA 33B, file 2 of 4",
    "24a87f01028cbd3a12de551dcedb712346c0b5cbdeff1454e0ddf2df9b675378": "LLaMA 33B, file 3 of 4",
    "1adfcef71420886119544949767f6a56cb6339b4d5fcde755d80fe68b49de93b": "LLaMA 33B, file 4 of 4",
    "0087155d6df07106c1d910bfeb6aab1be8e612dfbf2b56ddfb4ccbde7dbd50d0": "LLaMA 7B of transformers",
    "461bc5e50200db7813ff99cc0b9316c48ccbd6aaaa31bf8cf7bee0b64bc3eda3": "LLaMA 7B of transformers",
}


def find_published_name(sha256: str) -> str | None:
    """Return which published file has a hash, or None."""
    return _ORIGINALS.get(sha256)
