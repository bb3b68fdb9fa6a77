"""One file per data set; `data.prepare.ADAPTERS` lists them."""
