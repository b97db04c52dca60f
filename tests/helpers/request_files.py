"""Files of requests for tests."""

import json
import random

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def mixed(n, seed=0):
    """Requests of all kinds, some of which are wrong."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        text = "Once upon a time " * rng.randint(1, 6)
        match i % 6:
            case 0:
                body = {
                    "model": "x",
                    "prompt": text,
                    "max_tokens": rng.randint(1, 9),
                    "temperature": 0.8,
                    "logprobs": 1,
                }
                lines.append({"custom_id": f"a{i}", "method": "POST", "url": "/v1/completions", "body": body})
            case 1:
                lines.append({"id": i, "context": text, "continuations": [", there was", " a dog", ","]})
            case 2:
                lines.append({"custom_id": f"c{i}", "input": [text, "The dog"], "encoding_format": "base64"})
            case 3:
                lines.append({"custom_id": f"d{i}", "prompt": "The dog", "n": 2, "max_tokens": 3, "seed": i})
            case 4:
                messages = [{"role": "user", "content": text}]
                lines.append({"id": f"e{i}", "messages": messages, "max_tokens": 4, "chat_template": TEMPLATE})
            case 5:
                lines.append({"id": f"f{i}", "prompt": text, "top_p": 7})
    return [json.dumps(line).encode() for line in lines]


def write(folder, lines):
    source = folder / "in.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    return source, folder / "out.jsonl"


def bodies(output):
    """Answers by request, None for a failure."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {r["custom_id"]: r["response"] and r["response"]["body"] for r in records}
