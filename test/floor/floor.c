/*
 * What the machine can do between two processes, as plain as it can be had: the
 * floors and the alternatives that the toolkit is measured against. Each of the
 * two processes is pinned to a CPU.
 *
 *   floor MODE COUNT WARMUP CPU0 CPU1
 *
 * Round trips, COUNT of them:
 *   poll       a cache line in each direction that both look at all the time
 *   poll64     the same with 64 bytes that are copied in and out
 *   eventfd    a blocking eventfd in each direction
 *   futex      a futex in each direction
 * One way, COUNT blocks of 64 KiB, copied in and out:
 *   memcpy     through a shared buffer of 256 KiB, both sides looking
 *   pipe, stream, tcp   by write and read
 * One way, COUNT messages of 64 bytes:
 *   seqpacket  by write and read on a Unix socket
 *
 * Prints one JSON object. A sample of poll and poll64 is the mean of 16 round
 * trips, so that the reading of the clock is not part of it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/futex.h>
#include <netinet/tcp.h>
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
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (64 << 10)
#define SLOTS 4

struct half {
	_Alignas(128) _Atomic uint64_t seq;
	_Alignas(64) char data[64];
	_Alignas(128) _Atomic uint32_t word;
};

static struct shared {
	struct half half[2]; /* 0: written by the parent, 1: by the child */
	struct {
		_Alignas(128) _Atomic uint64_t filled;
		_Alignas(128) _Atomic uint64_t emptied;
	} slot[SLOTS];
	_Alignas(4096) char block[SLOTS][BLOCK];
} *s;

static int fds[2];   /* eventfds */
static int ends[2];  /* of a pipe or a pair of sockets: the parent's, the child's */
static char buffer[BLOCK];

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

static double cpu_seconds(int who)
{
	struct rusage r;

	getrusage(who, &r);
	return r.ru_utime.tv_sec + r.ru_stime.tv_sec + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

/* Round trips: give tells the other side that it is message i, take waits. */

static void poll_give(int me, uint64_t i)
{
	atomic_store_explicit(&s->half[me].seq, i, memory_order_release);
}

static void poll_take(int me, uint64_t i)
{
	while (atomic_load_explicit(&s->half[!me].seq, memory_order_acquire) != i)
		;
}

static void poll64_give(int me, uint64_t i)
{
	buffer[0] = i;
	memcpy(s->half[me].data, buffer, 64);
	poll_give(me, i);
}

static void poll64_take(int me, uint64_t i)
{
	poll_take(me, i);
	memcpy(buffer, s->half[!me].data, 64);
	__asm__ volatile("" : : : "memory"); /* the copy is really made */
}

static void eventfd_give(int me, uint64_t i)
{
	uint64_t one = 1;

	(void)i;
	if (write(fds[me], &one, sizeof one) != sizeof one)
		fail("write eventfd");
}

static void eventfd_take(int me, uint64_t i)
{
	uint64_t n;

	(void)i;
	if (read(fds[!me], &n, sizeof n) != sizeof n)
		fail("read eventfd");
}

static void futex_give(int me, uint64_t i)
{
	atomic_store(&s->half[me].word, (uint32_t)i);
	if (syscall(SYS_futex, &s->half[me].word, FUTEX_WAKE, 1, NULL, NULL, 0) < 0)
		fail("futex");
}

static void futex_take(int me, uint64_t i)
{
	uint32_t v;

	while ((v = atomic_load(&s->half[!me].word)) != (uint32_t)i)
		if (syscall(SYS_futex, &s->half[!me].word, FUTEX_WAIT, v, NULL, NULL, 0) < 0 && errno != EAGAIN && errno != EINTR)
			fail("futex");
}

/* One way: give sends message i, take receives it. */

static void memcpy_give(int me, uint64_t i)
{
	int k = i % SLOTS;

	(void)me;
	while (i > SLOTS && atomic_load_explicit(&s->slot[k].emptied, memory_order_acquire) != i - SLOTS)
		;
	buffer[0] = i;
	memcpy(s->block[k], buffer, BLOCK);
	atomic_store_explicit(&s->slot[k].filled, i, memory_order_release);
}

static void memcpy_take(int me, uint64_t i)
{
	int k = i % SLOTS;

	(void)me;
	while (atomic_load_explicit(&s->slot[k].filled, memory_order_acquire) != i)
		;
	memcpy(buffer, s->block[k], BLOCK);
	__asm__ volatile("" : : : "memory");
	atomic_store_explicit(&s->slot[k].emptied, i, memory_order_release);
}

static void whole(int me, size_t size, int writing)
{
	for (size_t done = 0; done < size;) {
		ssize_t n = writing ? write(ends[me], buffer + done, size - done) : read(ends[me], buffer + done, size - done);

		if (n <= 0)
			fail("read or write");
		done += n;
	}
}

static void block_give(int me, uint64_t i) { (void)i; whole(me, BLOCK, 1); }
static void block_take(int me, uint64_t i) { (void)i; whole(me, BLOCK, 0); }
static void small_give(int me, uint64_t i) { (void)i; whole(me, 64, 1); }
static void small_take(int me, uint64_t i) { (void)i; whole(me, 64, 0); }

static void no_set_up(void) { }

static void eventfd_set_up(void)
{
	fds[0] = eventfd(0, EFD_CLOEXEC);
	fds[1] = eventfd(0, EFD_CLOEXEC);
	if (fds[0] < 0 || fds[1] < 0)
		fail("eventfd");
}

static void pipe_set_up(void)
{
	int p[2];

	if (pipe(p))
		fail("pipe");
	ends[0] = p[1];
	ends[1] = p[0];
}

static void stream_set_up(void)
{
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		fail("socketpair");
}

static void seqpacket_set_up(void)
{
	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends))
		fail("socketpair");
}

static void tcp_set_up(void)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof a;
	int l = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	if (l < 0 || bind(l, (void *)&a, sizeof a) || listen(l, 1) || getsockname(l, (void *)&a, &len))
		fail("listen");
	ends[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (ends[0] < 0 || connect(ends[0], (void *)&a, sizeof a))
		fail("connect");
	ends[1] = accept(l, NULL, NULL);
	if (ends[1] < 0 || setsockopt(ends[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
		fail("accept");
}

static const struct mode {
	const char *name;
	void (*set_up)(void);
	void (*give)(int me, uint64_t i);
	void (*take)(int me, uint64_t i);
	int size;  /* one way: bytes of a message; 0: round trips */
	int batch; /* round trips of a sample */
} modes[] = {
	{ "poll", no_set_up, poll_give, poll_take, 0, 16 },
	{ "poll64", no_set_up, poll64_give, poll64_take, 0, 16 },
	{ "eventfd", eventfd_set_up, eventfd_give, eventfd_take, 0, 1 },
	{ "futex", no_set_up, futex_give, futex_take, 0, 1 },
	{ "memcpy", no_set_up, memcpy_give, memcpy_take, BLOCK, 1 },
	{ "pipe", pipe_set_up, block_give, block_take, BLOCK, 1 },
	{ "stream", stream_set_up, block_give, block_take, BLOCK, 1 },
	{ "tcp", tcp_set_up, block_give, block_take, BLOCK, 1 },
	{ "seqpacket", seqpacket_set_up, small_give, small_take, 64, 1 },
};

static int ascending(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

static void child(const struct mode *m, uint64_t total, int cpu)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin(cpu);
	for (uint64_t i = 1; i <= total; i++) {
		m->take(1, i);
		if (!m->size)
			m->give(1, i);
	}
}

int main(int argc, char **argv)
{
	const struct mode *m = NULL;
	uint64_t count, warmup, i;
	int64_t *rtt, begin = 0, start = 0;
	size_t samples = 0;
	double used = 0, elapsed;
	int status;
	pid_t pid;

	for (i = 0; argc == 6 && i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(argv[1], modes[i].name))
			m = &modes[i];
	if (!m || (count = strtoull(argv[2], NULL, 0)) == 0) {
		fprintf(stderr, "usage: floor MODE COUNT WARMUP CPU0 CPU1, see floor.c\n");
		return 2;
	}
	warmup = strtoull(argv[3], NULL, 0);
	s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	rtt = calloc(count, sizeof *rtt);
	if (s == MAP_FAILED || !rtt)
		fail("memory");
	m->set_up();
	pid = fork();
	if (pid < 0)
		fail("fork");
	if (pid == 0) {
		child(m, warmup + count, atoi(argv[5]));
		return 0;
	}
	pin(atoi(argv[4]));
	for (i = 1; i <= warmup + count; i++) {
		if (i == warmup + 1) {
			begin = now();
			used = cpu_seconds(RUSAGE_SELF);
		}
		if (!m->size && (i - warmup - 1) % m->batch == 0)
			start = now();
		m->give(0, i);
		if (m->size)
			continue;
		m->take(0, i);
		if (i > warmup && (i - warmup) % m->batch == 0)
			rtt[samples++] = (now() - start) / m->batch;
	}
	if (m->size) { /* until everything has arrived */
		if (waitpid(pid, &status, 0) != pid || status)
			fail("child");
	}
	elapsed = now() - begin;
	used = cpu_seconds(RUSAGE_SELF) - used + cpu_seconds(RUSAGE_CHILDREN);
	if (!m->size && (waitpid(pid, &status, 0) != pid || status))
		fail("child");
	printf("{\"mode\":\"%s\",\"messages\":%llu,\"mean_ns\":%.1f", m->name, (unsigned long long)count, elapsed / count);
	if (m->size) {
		double bytes = (double)count * m->size;

		printf(",\"bytes_per_s\":%.0f,\"cpu_s_per_gb\":%.3f", bytes / elapsed * 1e9, used / (bytes / 1e9));
	} else if (samples) {
		qsort(rtt, samples, sizeof *rtt, ascending);
		printf(",\"rtt_ns\":{\"min\":%lld,\"p50\":%lld,\"p99\":%lld,\"max\":%lld}", (long long)rtt[0],
		       (long long)rtt[samples / 2], (long long)rtt[samples - 1 - samples / 100], (long long)rtt[samples - 1]);
	}
	printf("}\n");
	return 0;
}
