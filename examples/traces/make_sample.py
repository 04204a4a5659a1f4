#!/usr/bin/env python3
"""Writes sample.csv: a made-up request trace of 240 requests over about two minutes.

Prompt lengths are log-normal (median about 350 tokens, a tail to 6000), answers log-normal with a
median of 24; three calm spells and two bursts. The same file on every machine: the generator is a
64-bit linear congruential one, written out here, and no library function is used that may differ.

Usage: make_sample.py > sample.csv
"""

import datetime
import math

NUM_REQUESTS = 240
START = datetime.datetime(2024, 5, 6, 9, 0, 0)


class Random:
    def __init__(self, seed):
        self.state = seed

    def uniform(self):
        """In (0, 1)."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return ((self.state >> 11) + 0.5) / 2**53

    def normal(self):
        return sum(self.uniform() for _ in range(12)) - 6.0


def clamp(value, low, high):
    return max(low, min(high, int(value)))


def main():
    random = Random(20240506)
    seconds = 0.0
    print("TIMESTAMP,ContextTokens,GeneratedTokens")
    for i in range(NUM_REQUESTS):
        burst = 60 <= i < 100 or 170 <= i < 210
        gap = 0.08 if burst else 0.7
        prompt = clamp(350 * math.exp(1.05 * random.normal()), 8, 6000)
        generated = clamp(24 * math.exp(0.9 * random.normal()), 1, 400)
        stamp = START + datetime.timedelta(microseconds=round(seconds * 1000) * 1000)
        print(f"{stamp:%Y-%m-%d %H:%M:%S}.{stamp.microsecond:06d},{prompt},{generated}")
        seconds += -gap * math.log(random.uniform())


if __name__ == "__main__":
    main()
