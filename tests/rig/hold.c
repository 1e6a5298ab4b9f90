/* Holds one idle VM open until it is killed.
 *
 * In the rig, opening and closing some dozens of VMs one after the other leaves both emulated CPUs spinning; while one
 * VM stays open, hundreds of them pass. Says so and ends at once when no VM can be made, so that the rig can tell.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm < 0 || ioctl(kvm, KVM_CREATE_VM, 0) < 0) {
		perror("hold: /dev/kvm");
		return 1;
	}
	for (;;)
		pause();
}
