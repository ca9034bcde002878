"""GOT-OCR 2, and PP-Chart2Table of the same class: a windowed tower, shrunk by convolutions in the projector.

The tiles of an image follow one another in the prompt and share one budget. So do the pages of a multi-page prompt,
which nothing in it tells from tiles.
"""

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTERS = (
    Adapter(model_type="got_ocr2", family="GOT-OCR 2", merge_adjacent=True, layout=tiles),
    Adapter(model_type="pp_chart2table", family="PP-Chart2Table", layout=tiles),
)
