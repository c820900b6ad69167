/*
 * The floor under a round trip between two processes of one machine, as plain
 * as it can be had: a shared cache line per direction that both look at all the
 * time, or a blocking eventfd per direction. Each process is pinned to a CPU.
 *
 *   floor poll|eventfd ROUNDS WARMUP CPU0 CPU1
 *
 * Prints one JSON object with the distribution of the round trips.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct lines {
	_Alignas(64) _Atomic uint64_t ping;
	_Alignas(64) _Atomic uint64_t pong;
};

static void fail(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		fail("sched_setaffinity");
}

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void await_value(_Atomic uint64_t *line, uint64_t value)
{
	while (atomic_load_explicit(line, memory_order_acquire) != value)
		;
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof one) != sizeof one)
		fail("write eventfd");
}

static void await_fd(int fd)
{
	uint64_t n;

	if (read(fd, &n, sizeof n) != sizeof n)
		fail("read eventfd");
}

static int ascending(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	struct lines *l;
	uint64_t rounds, warmup, i;
	int64_t *rtt;
	int fds[2], poll, status;
	pid_t child;

	if (argc != 6 || (strcmp(argv[1], "poll") && strcmp(argv[1], "eventfd"))) {
		fprintf(stderr, "usage: floor poll|eventfd ROUNDS WARMUP CPU0 CPU1\n");
		return 2;
	}
	poll = !strcmp(argv[1], "poll");
	rounds = strtoull(argv[2], NULL, 0);
	warmup = strtoull(argv[3], NULL, 0);
	l = mmap(NULL, sizeof *l, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	rtt = calloc(rounds, sizeof *rtt);
	fds[0] = eventfd(0, EFD_CLOEXEC);
	fds[1] = eventfd(0, EFD_CLOEXEC);
	if (l == MAP_FAILED || !rtt || rounds == 0 || fds[0] < 0 || fds[1] < 0)
		fail("set up");

	child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[5]));
		for (i = 1; i <= warmup + rounds; i++) {
			if (poll) {
				await_value(&l->ping, i);
				atomic_store_explicit(&l->pong, i, memory_order_release);
			} else {
				await_fd(fds[0]);
				signal_fd(fds[1]);
			}
		}
		return 0;
	}
	pin(atoi(argv[4]));
	for (i = 1; i <= warmup + rounds; i++) {
		int64_t start = now();

		if (poll) {
			atomic_store_explicit(&l->ping, i, memory_order_release);
			await_value(&l->pong, i);
		} else {
			signal_fd(fds[0]);
			await_fd(fds[1]);
		}
		if (i > warmup)
			rtt[i - warmup - 1] = now() - start;
	}
	if (waitpid(child, &status, 0) != child || status)
		fail("child");
	qsort(rtt, rounds, sizeof *rtt, ascending);
	printf("{\"mode\":\"%s\",\"messages\":%llu,\"rtt_ns\":{\"min\":%lld,\"p50\":%lld,\"p99\":%lld,\"max\":%lld}}\n",
	       argv[1], (unsigned long long)rounds, (long long)rtt[0], (long long)rtt[rounds / 2],
	       (long long)rtt[rounds - 1 - rounds / 100], (long long)rtt[rounds - 1]);
	return 0;
}
