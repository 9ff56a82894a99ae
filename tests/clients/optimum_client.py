"""optimum's `ORTModelForSequenceClassification` in a pipeline of transformers, of an environment of its own.

python optimum_client.py FOLDER FILE < texts.json
"""

import json
import sys

from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline


def main(folder: str, file: str, texts: list[str]) -> list[dict[str, object]]:
    model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx", file_name=file)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    return [classify(text)[0] for text in texts]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.load(sys.stdin))))
