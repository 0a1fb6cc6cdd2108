/* A Vulkan loader in which one function fails, as after a reset of a GPU or without free memory.

   REAL_VULKAN: file of the real loader.
   FAILING_CALLS: name of a function, calls that succeed, and the VkResult of the later ones,
   such as "vkQueueSubmit 20 -4". Counted are vkQueueSubmit and vkAllocateMemory. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Function)(void);
typedef Function (*Lookup)(void *, const char *);
typedef int (*Submit)(void *, uint32_t, const void *, void *);
typedef int (*Allocate)(void *, const void *, const void *, void *);

static Submit real_submit;
static Allocate real_allocate;
static Lookup real_device_lookup;

static void *real(const char *name) {
  return dlsym(dlopen(getenv("REAL_VULKAN"), RTLD_NOW | RTLD_LOCAL), name);
}

static Lookup real_lookup(void) {
  static Lookup found;
  if (!found) found = (Lookup)real("vkGetInstanceProcAddr");
  return found;
}

/* The VkResult of a failing call; 0 if it is to succeed. */
static int failure(const char *name) {
  static int calls;
  char failing[64];
  int allowed, result;
  const char *setting = getenv("FAILING_CALLS");
  if (!setting || sscanf(setting, "%63s %d %d", failing, &allowed, &result) != 3) return 0;
  if (strcmp(name, failing) || ++calls <= allowed) return 0;
  return result;
}

static int submit(void *queue, uint32_t count, const void *submits, void *fence) {
  int failed = failure("vkQueueSubmit");
  return failed ? failed : real_submit(queue, count, submits, fence);
}

static int allocate(void *device, const void *info, const void *allocator, void *memory) {
  int failed = failure("vkAllocateMemory");
  return failed ? failed : real_allocate(device, info, allocator, memory);
}

static Function device_lookup(void *device, const char *name);
Function vkGetInstanceProcAddr(void *instance, const char *name);

static Function wrapped(Function found, const char *name) {
  if (!found) return found;
  if (!strcmp(name, "vkQueueSubmit")) {
    real_submit = (Submit)found;
    return (Function)submit;
  }
  if (!strcmp(name, "vkAllocateMemory")) {
    real_allocate = (Allocate)found;
    return (Function)allocate;
  }
  if (!strcmp(name, "vkGetDeviceProcAddr")) {
    real_device_lookup = (Lookup)found;
    return (Function)device_lookup;
  }
  return found;
}

static Function device_lookup(void *device, const char *name) {
  return wrapped(real_device_lookup(device, name), name);
}

Function vkGetInstanceProcAddr(void *instance, const char *name) {
  if (!strcmp(name, "vkGetInstanceProcAddr")) return (Function)vkGetInstanceProcAddr;
  return wrapped(real_lookup()(instance, name), name);
}

/* Functions that llama.cpp's library takes from the loader by name. */
void vkCmdCopyBuffer(void *commands, void *from, void *to, uint32_t count, const void *regions) {
  typedef void (*Copy)(void *, void *, void *, uint32_t, const void *);
  static Copy copy;
  if (!copy) copy = (Copy)real("vkCmdCopyBuffer");
  copy(commands, from, to, count, regions);
}

void vkGetPhysicalDeviceFeatures2(void *device, void *features) {
  typedef void (*Query)(void *, void *);
  ((Query)real("vkGetPhysicalDeviceFeatures2"))(device, features);
}
