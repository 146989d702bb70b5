"""What the bundled model knows by heart: facts about the engine, greetings, and what to say when it does not know."""

from __future__ import annotations

FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What is llm-engine?", "Tell me about llm-engine.", "What does llm-engine do?", "What is this engine?"),
        "llm-engine is an inference engine for large language models. It serves Hugging Face models from plain "
        "threads, and its scheduler can be swapped by name.",
    ),
    (
        ("Who is llm-engine for?", "Who uses llm-engine?", "Who should use llm-engine?"),
        "It is for people who run and study scheduling.",
    ),
    (
        (
            "Does llm-engine use asyncio?",
            "Is there an event loop?",
            "Do you use asyncio?",
            "Is the engine asynchronous?",
        ),
        "No. There is no asyncio anywhere: the engine runs on plain threads.",
    ),
    (
        (
            "How many threads drive the engine?",
            "Which threads does the engine have?",
            "What are the two threads?",
            "How many threads does llm-engine have?",
        ),
        "Two threads drive the engine: the scheduling thread and the output thread.",
    ),
    (
        ("What does the scheduling thread do?", "What is the scheduling thread?", "What is the scheduling thread for?"),
        "The scheduling thread drains the inbox, asks the scheduler for a plan, takes the blocks and pushes the "
        "plan to the executor.",
    ),
    (
        ("What does the output thread do?", "What is the output thread?", "What is the output thread for?"),
        "The output thread collects results, advances the requests, frees what has finished and hands new tokens "
        "to the streams.",
    ),
    (
        ("What is a scheduler?", "What does the scheduler do?", "What are the parts of a scheduler?"),
        "A scheduler decides who runs next. It is made of three parts: ordering, capacity and micro-batch.",
    ),
    (
        (
            "Can I write my own scheduler?",
            "How do I add a scheduler?",
            "Are schedulers pluggable?",
            "Can I swap the scheduler?",
        ),
        "Yes. Schedulers are pluggable: name yours as package.module:Class or register it as an entry point.",
    ),
    (
        ("What is the default scheduler?", "Which scheduler is the default?"),
        "The default scheduler serves first come, first served, keeps as many requests resident as fit, and fills "
        "each micro-batch greedily.",
    ),
    (
        (
            "What is the KV cache?",
            "How does the KV cache work?",
            "What is a paged KV cache?",
            "What is paged attention?",
        ),
        "The KV cache keeps the keys and values of past tokens. It is paged: memory is cut into blocks of sixteen "
        "tokens, and a request takes blocks as it grows.",
    ),
    (
        ("How large is a block?", "What is the block size?", "How many tokens are in a block?"),
        "A block holds sixteen tokens by default, and sixty-four on a GPU.",
    ),
    (
        (
            "What is prefix caching?",
            "How does prefix caching work?",
            "What is the prefix cache?",
            "Is prefix caching on?",
        ),
        "Prefix caching reuses the blocks of a prompt that was seen before, so that a shared beginning is computed"
        " once. It is on by default.",
    ),
    (
        ("What happens when memory runs out?", "What is preemption?", "What happens to a paused request?"),
        "A request is paused and its blocks are freed. When it resumes, its tokens are computed again, and the "
        "answer stays the same.",
    ),
    (
        ("What is a pipeline stage?", "What is a stage?", "What are pipeline stages?"),
        "A pipeline stage holds some of the layers of the model. Micro-batches pass from stage to stage, and the "
        "last stage samples the next tokens.",
    ),
    (
        ("What is a running queue?", "What are running queues?", "How many running queues are there?"),
        "A running queue is a group of requests that decode together in one micro-batch. There are as many queues "
        "as stages.",
    ),
    (
        ("What is a micro-batch?", "What is in a micro-batch?"),
        "A micro-batch is the work of one step: some decodes, one token each, and chunks of prompts.",
    ),
    (
        ("What is chunked prefill?", "Why are prompts cut into chunks?", "How are long prompts handled?"),
        "A long prompt is computed in chunks, so that other requests keep getting tokens in between.",
    ),
    (
        ("What is continuous batching?", "How are requests batched?"),
        "New requests join and finished ones leave at every step, so the batch is always full.",
    ),
    (
        ("What is an executor?", "What does the executor do?"),
        "An executor carries plans to the stages and brings back their results. Pushing never waits for a result.",
    ),
    (
        (
            "Which attention does llm-engine use?",
            "How is attention computed?",
            "What is xformers used for?",
            "Does llm-engine use xformers?",
        ),
        "Attention is the memory-efficient attention of xformers, on the CPU through an operator of our own.",
    ),
    (
        (
            "Which API does the server speak?",
            "Is there an OpenAI API?",
            "Is it compatible with OpenAI?",
            "What API do you have?",
        ),
        "The server speaks the OpenAI API: completions, chat completions and models, with streaming.",
    ),
    (
        ("How do I start the server?", "How do I serve a model?", "How can I run the engine?"),
        "Run make serve, or llm-engine serve with the name of a model.",
    ),
    (
        ("Which commands are there?", "What can the command line do?", "Which commands does llm-engine have?"),
        "The commands are serve, generate, chat, schedulers and bench.",
    ),
    (
        ("How do I use it from Python?", "Is there a Python library?", "How do I use llm-engine as a library?"),
        "Import LLM from llm_engine and call generate, chat, stream or submit. Any number of threads may call it.",
    ),
    (
        (
            "Which metrics are there?",
            "Are there metrics?",
            "How do I monitor the engine?",
            "Does it work with Prometheus?",
        ),
        "Prometheus metrics are at /metrics: requests, tokens, time to first token, KV cache usage and more.",
    ),
    (
        ("Which models can it run?", "Which models are supported?", "What models does llm-engine support?"),
        "It runs Llama, Mistral, Qwen, SmolLM, Phi, Gemma and Mixtral models in Hugging Face format.",
    ),
    (
        ("What is time to first token?", "What does TTFT mean?"),
        "Time to first token is how long a caller waits before the first token of the answer arrives.",
    ),
    (
        ("What happens when a client disconnects?", "What if the client goes away?"),
        "The request is aborted and its blocks are freed within a step.",
    ),
)

ABILITIES = "I can add two-digit numbers, tell short stories and answer a few questions about llm-engine."
UNKNOWN_REPLY = f"I am a small demo model and do not know that. {ABILITIES}"

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Hey", "Hi there!", "Hello there!", "Good morning!", "Good evening!"),
        f"Hello! I am a small demo model. {ABILITIES}",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a language model?"),
        f"I am a small demo model that comes with llm-engine. {ABILITIES}",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help!", "Can you help me?"),
        ABILITIES,
    ),
    (("How are you?", "How are you doing?", "How do you do?"), "I am fine, thank you. What can I do for you?"),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Great, thank you.", "Thank you very much!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye! It was nice to talk with you."),
    (
        ("How large are you?", "How many parameters do you have?", "How big is this model?", "How were you trained?"),
        "I am very small: about two million parameters, trained on two CPU cores with text made by a script.",
    ),
)

_COUNTRIES = "France Germany Japan Brazil Canada Spain Italy Kenya India Peru Norway China Egypt Mexico".split()
_TOPICS = (
    "the weather", "music", "football", "history", "physics", "the moon", "politics", "love", "cooking", "dinosaurs",
    "cars", "computers", "the ocean", "mathematics", "medicine", "money", "quantum computing", "art", "the stars",
    "Python",
)  # fmt: skip
_PEOPLE = ("Einstein", "Shakespeare", "Napoleon", "Mozart", "Darwin", "Newton", "Picasso", "Cleopatra", "the president")
_WORDS = "hello tree house water bread green friend happy winter mountain".split()

UNKNOWN_QUESTIONS: tuple[tuple[str, tuple[str, ...] | list[str]], ...] = (
    ("What is the capital of {x}?", _COUNTRIES),
    ("How many people live in {x}?", _COUNTRIES),
    ("Where is {x}?", _COUNTRIES),
    ("What language do they speak in {x}?", _COUNTRIES),
    ("Explain {x}.", _TOPICS),
    ("What do you think about {x}?", _TOPICS),
    ("Write a poem about {x}.", _TOPICS),
    ("Tell me about {x}.", _TOPICS),
    ("What is the meaning of {x}?", _TOPICS),
    ("Who was {x}?", _PEOPLE),
    ("When was {x} born?", _PEOPLE),
    ("What did {x} do?", _PEOPLE),
    ("Translate {x} into French.", _WORDS),
    ("What does {x} mean?", _WORDS),
    ("How do you spell {x}?", _WORDS),
    ("Write a program about {x}.", _TOPICS),
    ("Why is {x} so important?", _TOPICS),
)
