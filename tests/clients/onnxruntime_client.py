"""Plain onnxruntime: numpy, tokenizers, and nothing of transformers, PyTorch or this project.

python onnxruntime_client.py FOLDER FILE < texts.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(folder: Path, file: str, texts: list[str]) -> list[dict[str, object]]:
    names = json.loads((folder / "config.json").read_text())["id2label"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "onnx" / file, providers=["CPUExecutionProvider"])
    wanted = {tensor.name for tensor in session.get_inputs()}
    predictions = []
    for text in texts:
        encoding = tokenizer.encode(text)
        inputs = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        (logits,) = session.run(["logits"], {name: np.array([inputs[name]], dtype=np.int64) for name in wanted})
        probabilities = np.exp(logits[0] - logits[0].max())
        probabilities /= probabilities.sum()
        best = int(probabilities.argmax())
        predictions.append({"label": names[str(best)], "score": float(probabilities[best])})
    return predictions


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], json.load(sys.stdin))))
