/* The Metal device of a build without Metal. */
#include "../device.h"

static const char *unavailable(void) { return "not available: built without Metal"; }

const qz_device qz_metal_device = {.name = "metal", .unavailable = unavailable};
