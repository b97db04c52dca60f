"""Small tasks of lm-evaluation-harness, whose documents are like what the models of the tests know."""

import json

import lm_eval
from lm_eval.tasks import TaskManager

CHOICES = [
    ("Once upon a time,", ["there was a little girl", "fish the blue of"], 0),
    ("Lily went to the", ["park", "under", "swam"], 0),
    ("The dog was very", ["table", "happy"], 1),
    ("Tom had a red", ["ball.", "sky and he ate the moon."], 1),
    ("She wanted to play with", ["sleep", "her friends", "it"], 2),
    ("He said, ", ['"I\'m sorry, Lily."', "zebra"], 0),  # the space in front goes to the choice
    ("The sun is", ["hot", "sunny day to"], 0),
    ("Lily and her mom went", ["to the store.", "home"], 1),
]
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "The café was closed — nobody knew why.\n\n  Two   spaces, and a tab\there.",
    "dog",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tasks(folder, data):
    """Tasks and their documents, in a folder, which is returned."""
    greedy = json.loads((data / "models" / "stories260K" / "greedy.json").read_text())
    answers = [g["text"].split(".")[0] for g in greedy]
    answers[1:2] = ["something else"]
    write(
        folder,
        "choice",
        [{"question": q, "choices": c, "label": i} for q, c, i in CHOICES],
        "output_type: multiple_choice",
        'doc_to_text: "{{question}}"',
        'doc_to_choice: "{{choices}}"',
        "doc_to_target: label",
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
        "fewshot_config: {sampler: first_n}",
        "fewshot_split: test",
    )
    write(
        folder,
        "rolling",
        [{"text": text} for text in TEXTS],
        "output_type: loglikelihood_rolling",
        'doc_to_text: ""',
        'doc_to_target: "{{text}}"',
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
    )
    write(
        folder,
        "generate",
        [{"prompt": g["prompt"], "answer": answer} for g, answer in zip(greedy, answers, strict=True)],
        "output_type: generate_until",
        'doc_to_text: "{{prompt}}"',
        'doc_to_target: "{{answer}}"',
        'generation_kwargs: {until: ["."], max_gen_toks: 64, do_sample: false, temperature: 0.0, num_beams: 1}',
        "metric_list: [{metric: exact_match}]",
    )
    write(
        folder,
        "prefixed",
        [{"question": q, "choices": c, "label": i} for q, c, i in CHOICES],
        "output_type: multiple_choice",
        'doc_to_text: "{{question}}"',
        'doc_to_choice: "{{choices}}"',
        "doc_to_target: label",
        'gen_prefix: "I say"',
        "metric_list: [{metric: acc}]",
    )
    return folder


def write(folder, name, documents, *lines):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = (
        f"task: oxjax_{name}",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}",
        "test_split: test",
    )
    (folder / f"{name}.yaml").write_text("\n".join(common + lines) + "\n")


def evaluate(tasks, names, model="oxjax", **options):
    """Results and samples by task; answers are in the order of documents."""
    found = lm_eval.simple_evaluate(
        model,
        tasks=[f"oxjax_{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    samples = {name: sorted(found["samples"][f"oxjax_{name}"], key=lambda s: s["doc_id"]) for name in names}
    return {name: found["results"][f"oxjax_{name}"] for name in names}, samples, found["config"]
