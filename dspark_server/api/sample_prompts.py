"""Prompts that the dashboard offers and its background load sends, by domain: acceptance differs between domains."""

SAMPLE_PROMPTS: dict[str, tuple[str, ...]] = {
    "math": (
        "A bakery packs 12 rolls in a box. It fills 7 boxes and has 5 rolls left. How many rolls were baked? "
        "Work it out step by step.",
        "A train leaves at 9:40 and arrives at 12:15. How long is the journey in minutes? Show each step.",
        "Nora saves 15 euros a week. A bicycle costs 240 euros, and she already has 60. After how many weeks can she "
        "buy it? Explain.",
        "List the first ten square numbers, one a line, each as a product and its value.",
        "A garden is 8 m long and 5 m wide. What do 3 bags of seed cover if one bag covers 12 square metres? Is it "
        "enough?",
        "Solve 3x + 7 = 31 and check the answer by putting it back into the equation.",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number without recursion, with a docstring.",
        "Write a Python class Stack with push, pop, peek and is_empty, and show how it is used.",
        "Write a JavaScript function that counts how often each word occurs in a string.",
        "Write an SQL query that lists each customer's name with the total of their orders, largest first.",
        "Write a Python function that reads a CSV file and returns the mean of each numeric column.",
        "Write a Python program that prints the multiplication table from 1 to 5.",
    ),
    "chat": (
        "What should I look at when I buy a used bicycle?",
        "Tell me a short story about a lighthouse keeper who finds a message in a bottle.",
        "Explain to a ten-year-old why the sky is blue.",
        "Plan a quiet weekend in a small town by the sea, hour by hour.",
        "Give me five ideas for a dinner that takes less than half an hour.",
        "Write a polite letter that asks a neighbour to practise the trumpet a little earlier in the evening.",
    ),
}
