// What virtual Ethernet is compared with on the host.
//
//   net forward NAME FD     joins the TAP interface NAME to a socket, of which
//                           each packet is a frame, until it is killed
//   net offloads-off NAME   makes the interface NAME do without offloads
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int tap, peer;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void *from_tap(void *arg)
{
	static char frame[1 << 17];

	for (;;) {
		ssize_t n = read(tap, frame, sizeof(frame));
		if (n < 0)
			die("read from the interface");
		if (send(peer, frame, n, 0) < 0)
			die("send");
	}
	return arg;
}

static void to_tap(void)
{
	static char frame[1 << 17];

	for (;;) {
		ssize_t n = recv(peer, frame, sizeof(frame), 0);
		if (n <= 0)
			die("receive");
		if (write(tap, frame, n) < 0 && errno != EIO)
			die("write to the interface");
	}
}

static int forward(const char *name)
{
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	int size = 1 << 20;
	pthread_t thread;

	tap = open("/dev/net/tun", O_RDWR);
	if (tap < 0)
		die("/dev/net/tun");
	strncpy(r.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(tap, TUNSETIFF, &r))
		die("TUNSETIFF");
	setsockopt(peer, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	puts("ready");
	fflush(stdout);
	if (pthread_create(&thread, NULL, from_tap, NULL))
		die("thread");
	to_tap();
	return 0;
}

static int offloads_off(const char *name)
{
	static const unsigned int commands[] = {
		ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO, ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM, ETHTOOL_SSG,
	};
	int s = socket(AF_INET, SOCK_DGRAM, 0);

	for (unsigned int i = 0; i < sizeof(commands) / sizeof(*commands); i++) {
		struct ethtool_value v = { .cmd = commands[i], .data = 0 };
		struct ifreq r = { 0 };

		strncpy(r.ifr_name, name, IFNAMSIZ - 1);
		r.ifr_data = (void *)&v;
		if (ioctl(s, SIOCETHTOOL, &r) && errno != EOPNOTSUPP)
			die("ethtool");
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "forward")) {
		peer = atoi(argv[3]);
		return forward(argv[2]);
	}
	if (argc == 3 && !strcmp(argv[1], "offloads-off"))
		return offloads_off(argv[2]);
	fprintf(stderr, "net: forward NAME FD, or offloads-off NAME\n");
	return 2;
}
