/* Preloaded into every process of a job: writes down whom it connects to and which names it
   looks up, and lets it. Native libraries (gloo, NCCL, curl) are seen as Python is. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *value) {
  const char *path = getenv("SOCKET_LOG");
  if (!path) return;
  int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  if (file < 0) return;
  char line[512];
  int length = snprintf(line, sizeof line, "%s %s\n", what, value);
  if (write(file, line, length) != length) abort();
  close(file);
}

static void note_address(const struct sockaddr *address) {
  char text[INET6_ADDRSTRLEN];
  if (address && address->sa_family == AF_INET)
    note("address", inet_ntop(AF_INET, &((struct sockaddr_in *)address)->sin_addr, text, sizeof text));
  if (address && address->sa_family == AF_INET6)
    note("address", inet_ntop(AF_INET6, &((struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text));
}

int connect(int socket, const struct sockaddr *address, socklen_t length) {
  static int (*real)(int, const struct sockaddr *, socklen_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "connect");
  note_address(address);
  return real(socket, address, length);
}

ssize_t sendto(int socket, const void *data, size_t size, int flags,
               const struct sockaddr *address, socklen_t length) {
  static ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sendto");
  note_address(address);
  return real(socket, data, size, flags, address, length);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
  static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "getaddrinfo");
  if (name) note("name", name);
  return real(name, service, hints, found);
}
