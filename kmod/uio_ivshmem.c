// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ivshmem v2 PCI device (110A:4106) for user space, through UIO.
 *
 * Maps, in this order, absent ones left out: registers, state_table,
 * rw_section, input_sections, output_section. All interrupt vectors feed the
 * one counter of UIO.
 *
 * The device is untrusted here: a value of its is checked before it is used,
 * and a device that contradicts its specification is refused.
 */

#include <linux/bits.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/pci.h>
#include <linux/sizes.h>
#include <linux/uio_driver.h>
#include <linux/version.h>

#define DRV_NAME "uio_ivshmem"

#define IVSHMEM_VENDOR	0x110a
#define IVSHMEM_DEVICE	0x4106

/* Registers, 32 bits each. */
#define REG_ID		0x00
#define REG_MAX_PEERS	0x04
#define REG_INT_CONTROL	0x08
#define REG_STATE	0x10
#define REGS_LENGTH	0x14

/* The vendor-specific capability. */
#define CAP_LENGTH	0x02 /* 1 byte */
#define CAP_PRIV_CTRL	0x03 /* 1 byte */
#define CAP_STATE_TABLE	0x04 /* 4 bytes */
#define CAP_RW		0x08 /* 8 bytes */
#define CAP_OUTPUT	0x10 /* 8 bytes */
#define CAP_BASE	0x18 /* 8 bytes, only if the length is CAP_LONG */
#define CAP_SHORT	0x18
#define CAP_LONG	0x20

#define PRIV_CTRL_ONE_SHOT	BIT(0)

#define BAR_REGS	0
#define BAR_SHMEM	2

struct ivshmem {
	struct uio_info info;
	struct pci_dev *pdev;
	void __iomem *regs;

	/* Maps: which of info.mem user space may not write. */
	unsigned int maps;
	unsigned long readonly;

	/* Sizes of the sections; that of one output section. */
	u64 state_table, rw, output;
	u32 id, max_peers;

	/* Shared memory, wherever it is. */
	u64 base, total;

	/* Interrupts: MSI-X vectors, or none and INTx. */
	int vectors;
	int irqs; /* requested */

	/* Open files; the UIO core serialises open and release. */
	unsigned int files;
};

/*
 * The first interrupts may come before UIO has registered the device: if a
 * program before us left the device armed, or the device is a hostile one.
 */
static irqreturn_t ivshmem_interrupt(int irq, void *data)
{
	struct ivshmem *ivs = data;

	/*
	 * INTx has neither a status bit nor an acknowledgement, so an interrupt
	 * of another device on the line wakes our program too, which has to
	 * look around after each wake-up anyway. An emulator may hold the line
	 * until the device is accessed.
	 */
	if (!ivs->vectors)
		readl(ivs->regs + REG_INT_CONTROL);

	if (READ_ONCE(ivs->info.uio_dev))
		uio_event_notify(&ivs->info);
	return IRQ_HANDLED;
}

static int ivshmem_open(struct uio_info *info, struct inode *inode)
{
	struct ivshmem *ivs = container_of(info, struct ivshmem, info);

	ivs->files++;
	return 0;
}

/*
 * The last reference to an open file is gone, be it by close, by munmap, or
 * because the process was killed: tell the peers.
 */
static int ivshmem_release(struct uio_info *info, struct inode *inode)
{
	struct ivshmem *ivs = container_of(info, struct ivshmem, info);

	writel(0, ivs->regs + REG_STATE);
	ivs->files--;
	return 0;
}

/*
 * Which map is to be mapped, or NULL if it may not be mapped like this. Write
 * access has to be withheld for ever if *withhold is set.
 *
 * A private mapping would copy what is written to, so its writes would reach
 * nobody, and the copying would access registers in ways that they are not
 * made for.
 */
static const struct uio_mem *ivshmem_map(struct ivshmem *ivs, unsigned long map,
					 unsigned long length, bool write,
					 bool shared, bool *withhold)
{
	if (map >= ivs->maps || length > ivs->info.mem[map].size)
		return NULL;
	*withhold = !shared || (ivs->readonly & BIT(map));
	if (*withhold && write)
		return NULL;
	return &ivs->info.mem[map];
}

/* Sections are ordinary memory, registers are not. */
static pgprot_t ivshmem_prot(struct ivshmem *ivs, const struct uio_mem *mem, pgprot_t prot)
{
	return mem == &ivs->info.mem[0] ? pgprot_noncached(prot) : prot;
}

#ifdef UIO_HAS_MMAP_PREPARE
static int ivshmem_mmap_prepare(struct uio_info *info, struct vm_area_desc *desc)
{
	struct ivshmem *ivs = container_of(info, struct ivshmem, info);
	const struct uio_mem *mem;
	bool withhold;

	mem = ivshmem_map(ivs, desc->pgoff, vma_desc_size(desc),
			  vma_desc_test(desc, VMA_WRITE_BIT),
			  vma_desc_test(desc, VMA_SHARED_BIT), &withhold);
	if (!mem)
		return -EINVAL;
	if (withhold)
		vma_desc_clear_flags(desc, VMA_MAYWRITE_BIT);
	desc->page_prot = ivshmem_prot(ivs, mem, desc->page_prot);
	mmap_action_ioremap_full(desc, mem->addr >> PAGE_SHIFT);
	return 0;
}
#else
static int ivshmem_mmap(struct uio_info *info, struct vm_area_struct *vma)
{
	struct ivshmem *ivs = container_of(info, struct ivshmem, info);
	unsigned long length = vma->vm_end - vma->vm_start;
	const struct uio_mem *mem;
	bool withhold;

	mem = ivshmem_map(ivs, vma->vm_pgoff, length, vma->vm_flags & VM_WRITE,
			  vma->vm_flags & VM_SHARED, &withhold);
	if (!mem)
		return -EINVAL;
	if (withhold) {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
		vm_flags_clear(vma, VM_MAYWRITE);
#else
		vma->vm_flags &= ~VM_MAYWRITE;
#endif
	}
	vma->vm_page_prot = ivshmem_prot(ivs, mem, vma->vm_page_prot);
	return io_remap_pfn_range(vma, vma->vm_start, mem->addr >> PAGE_SHIFT,
				  length, vma->vm_page_prot);
}
#endif

static u64 read_u64(struct pci_dev *pdev, int where)
{
	u32 low, high;

	pci_read_config_dword(pdev, where, &low);
	pci_read_config_dword(pdev, where + 4, &high);
	return (u64)high << 32 | low;
}

static int check_size(struct pci_dev *pdev, const char *name, u64 size)
{
	if (!(size & (PAGE_SIZE - 1)))
		return 0;
	dev_err(&pdev->dev, "%s: expected a multiple of this kernel's page size 0x%lx, found 0x%llx bytes\n",
		name, PAGE_SIZE, size);
	return -EINVAL;
}

/* Reads and checks what the registers say. */
static int ivshmem_identify(struct ivshmem *ivs)
{
	struct device *dev = &ivs->pdev->dev;

	ivs->id = readl(ivs->regs + REG_ID);
	ivs->max_peers = readl(ivs->regs + REG_MAX_PEERS);
	if (ivs->max_peers < 2 || ivs->max_peers > SZ_64K) {
		dev_err(dev, "register Maximum Peers: expected 2 to 65536, found 0x%x\n", ivs->max_peers);
		return -EINVAL;
	}
	if (ivs->id >= ivs->max_peers) {
		dev_err(dev, "register ID: expected less than Maximum Peers (%u), found 0x%x\n",
			ivs->max_peers, ivs->id);
		return -EINVAL;
	}
	return 0;
}

/*
 * Reads and checks the capability and finds the shared memory. Returns the
 * offset of the capability in configuration space, or an error.
 */
static int ivshmem_layout(struct ivshmem *ivs)
{
	struct pci_dev *pdev = ivs->pdev;
	struct device *dev = &pdev->dev;
	u64 bar = pci_resource_len(pdev, BAR_SHMEM);
	int cap = pci_find_capability(pdev, PCI_CAP_ID_VNDR);
	int need = bar ? CAP_SHORT : CAP_LONG;
	u64 outputs, end;
	u32 state_table;
	u8 length;
	int err;

	if (!cap) {
		dev_err(dev, "expected a vendor-specific capability, found none\n");
		return -ENODEV;
	}
	pci_read_config_byte(pdev, cap + CAP_LENGTH, &length);
	if (length < need || cap + need > PCI_CFG_SPACE_SIZE) {
		dev_err(dev, "vendor-specific capability at 0x%x: expected a length of at least 0x%x (%s), found 0x%x\n",
			cap, need, bar ? "the memory is in BAR2" : "without BAR2 it holds the base address", length);
		return -EINVAL;
	}
	pci_read_config_dword(pdev, cap + CAP_STATE_TABLE, &state_table);
	ivs->state_table = state_table;
	ivs->rw = read_u64(pdev, cap + CAP_RW);
	ivs->output = read_u64(pdev, cap + CAP_OUTPUT);
	if (ivs->state_table < 4 * (u64)ivs->max_peers) {
		dev_err(dev, "State Table: expected at least 0x%llx bytes for %u peers, found 0x%llx\n",
			4 * (u64)ivs->max_peers, ivs->max_peers, ivs->state_table);
		return -EINVAL;
	}
	err = check_size(pdev, "State Table", ivs->state_table) ?:
	      check_size(pdev, "R/W section", ivs->rw) ?:
	      check_size(pdev, "output section", ivs->output);
	if (err)
		return err;
	if (check_mul_overflow(ivs->output, (u64)ivs->max_peers, &outputs) ||
	    check_add_overflow(ivs->state_table, ivs->rw, &ivs->total) ||
	    check_add_overflow(ivs->total, outputs, &ivs->total)) {
		dev_err(dev, "the sections exceed 64 bits: State Table 0x%llx, R/W section 0x%llx, %u output sections of 0x%llx bytes\n",
			ivs->state_table, ivs->rw, ivs->max_peers, ivs->output);
		return -EINVAL;
	}
	if (bar) {
		ivs->base = pci_resource_start(pdev, BAR_SHMEM);
		if (!(pci_resource_flags(pdev, BAR_SHMEM) & IORESOURCE_MEM) || ivs->total > bar) {
			dev_err(dev, "BAR2: expected memory for sections of 0x%llx bytes in all, found %pR\n",
				ivs->total, &pdev->resource[BAR_SHMEM]);
			return -EINVAL;
		}
	} else {
		ivs->base = read_u64(pdev, cap + CAP_BASE);
	}
	/* A page table entry cannot hold every address. */
	if (!ivs->base || !PAGE_ALIGNED(ivs->base) ||
	    check_add_overflow(ivs->base, ivs->total - 1, &end) ||
#ifdef PHYS_MASK
	    (end & ~(u64)PHYS_MASK) ||
#endif
	    end > iomem_resource.end) {
		dev_err(dev, "base address: expected a page's address below 0x%llx with space for 0x%llx bytes, found 0x%llx\n",
			(u64)iomem_resource.end, ivs->total, ivs->base);
		return -EINVAL;
	}
	return cap;
}

/* Claims the shared memory, so that nothing else in the kernel uses it. */
static int ivshmem_claim(struct ivshmem *ivs)
{
	if (request_mem_region(ivs->base, ivs->total, DRV_NAME))
		return 0;
	dev_err(&ivs->pdev->dev, "shared memory at 0x%llx, 0x%llx bytes: in use by another driver, or RAM of this kernel (see /proc/iomem)\n",
		ivs->base, ivs->total);
	return -EBUSY;
}

static void ivshmem_add_map(struct ivshmem *ivs, const char *name, u64 addr, u64 size, bool readonly)
{
	struct uio_mem *mem = &ivs->info.mem[ivs->maps];

	if (!size)
		return;
	if (readonly)
		ivs->readonly |= BIT(ivs->maps);
	mem->name = name;
	mem->addr = addr;
	mem->size = size;
	mem->memtype = UIO_MEM_PHYS;
	ivs->maps++;
}

/*
 * Finds out how many MSI-X vectors there are; 0 means INTx. The kernel itself
 * does not check that the table is inside its BAR.
 */
static int ivshmem_vectors(struct pci_dev *pdev)
{
	int count = pci_msix_vec_count(pdev);
	u64 end;
	u32 table;
	u8 bir;

	if (count <= 0)
		return 0;
	pci_read_config_dword(pdev, pdev->msix_cap + PCI_MSIX_TABLE, &table);
	bir = table & PCI_MSIX_TABLE_BIR;
	end = (u64)(table & PCI_MSIX_TABLE_OFFSET) + (u64)count * PCI_MSIX_ENTRY_SIZE;
	if (bir >= PCI_STD_NUM_BARS || end > pci_resource_len(pdev, bir)) {
		dev_err(&pdev->dev, "MSI-X: expected a BAR with a table of %d vectors up to 0x%llx, found BAR%d of 0x%llx bytes\n",
			count, end, bir, bir < PCI_STD_NUM_BARS ? (u64)pci_resource_len(pdev, bir) : 0);
		return -EINVAL;
	}
	return count;
}

static void ivshmem_free_irqs(struct ivshmem *ivs)
{
	while (ivs->irqs > 0) {
		ivs->irqs--;
		free_irq(ivs->vectors ? pci_irq_vector(ivs->pdev, ivs->irqs) : ivs->pdev->irq, ivs);
	}
	if (ivs->vectors)
		pci_free_irq_vectors(ivs->pdev);
}

/*
 * Sets up all vectors: in one-shot mode, one that is rung without being set
 * up would disarm the device and wake nobody.
 */
static int ivshmem_request_irqs(struct ivshmem *ivs)
{
	struct pci_dev *pdev = ivs->pdev;
	int wanted = 1, err;

	ivs->vectors = ivshmem_vectors(pdev);
	if (ivs->vectors < 0)
		return ivs->vectors;
	if (ivs->vectors) {
		wanted = ivs->vectors;
		err = pci_alloc_irq_vectors(pdev, wanted, wanted, PCI_IRQ_MSIX);
		if (err < 0) {
			dev_err(&pdev->dev, "expected %d MSI-X vectors of the kernel, got none: %d\n", wanted, err);
			return err;
		}
	} else if (pdev->pin && pdev->irq) {
		pci_intx(pdev, 1); /* the last driver may have disabled it */
	} else {
		dev_err(&pdev->dev, "expected MSI-X or an interrupt pin, found neither\n");
		return -ENODEV;
	}
	while (ivs->irqs < wanted) {
		err = ivs->vectors ?
		      request_irq(pci_irq_vector(pdev, ivs->irqs), ivshmem_interrupt, 0, ivs->info.name, ivs) :
		      request_irq(pdev->irq, ivshmem_interrupt, IRQF_SHARED, ivs->info.name, ivs);
		if (err) {
			dev_err(&pdev->dev, "interrupt of vector %d: %d\n", ivs->irqs, err);
			ivshmem_free_irqs(ivs);
			return err;
		}
		ivs->irqs++;
	}
	return 0;
}

/* Switches one-shot mode on: an interrupt disarms the device. */
static int ivshmem_one_shot(struct ivshmem *ivs, int cap)
{
	u8 ctrl = 0;

	pci_write_config_byte(ivs->pdev, cap + CAP_PRIV_CTRL, PRIV_CTRL_ONE_SHOT);
	pci_read_config_byte(ivs->pdev, cap + CAP_PRIV_CTRL, &ctrl);
	if (ctrl & PRIV_CTRL_ONE_SHOT)
		return 0;
	dev_err(&ivs->pdev->dev, "Privileged Control: expected the device to keep 0x%lx (one-shot mode), found 0x%x\n",
		PRIV_CTRL_ONE_SHOT, ctrl);
	return -EIO;
}

static int ivshmem_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct ivshmem *ivs;
	u64 regs, at;
	int cap, err;

	ivs = devm_kzalloc(dev, sizeof(*ivs), GFP_KERNEL);
	if (!ivs)
		return -ENOMEM;
	ivs->pdev = pdev;
	ivs->info.name = devm_kasprintf(dev, GFP_KERNEL, DRV_NAME "[%s]", pci_name(pdev));
	if (!ivs->info.name)
		return -ENOMEM;

	err = pci_enable_device(pdev);
	if (err) {
		dev_err(dev, "enable the device: %d\n", err);
		return err;
	}
	regs = pci_resource_len(pdev, BAR_REGS);
	if (!(pci_resource_flags(pdev, BAR_REGS) & IORESOURCE_MEM) || regs < REGS_LENGTH) {
		dev_err(dev, "BAR0: expected registers in memory space, found %pR\n", &pdev->resource[BAR_REGS]);
		err = -ENODEV;
		goto disable;
	}
	err = check_size(pdev, "BAR0", regs | pci_resource_start(pdev, BAR_REGS));
	if (err)
		goto disable;
	err = pci_request_region(pdev, BAR_REGS, DRV_NAME);
	if (err)
		goto disable; /* the PCI core has said why */
	ivs->regs = pci_iomap(pdev, BAR_REGS, PAGE_SIZE);
	if (!ivs->regs) {
		err = -ENOMEM;
		goto release_regs;
	}
	err = ivshmem_identify(ivs);
	if (err)
		goto unmap;
	cap = ivshmem_layout(ivs);
	if (cap < 0) {
		err = cap;
		goto unmap;
	}
	err = ivshmem_claim(ivs);
	if (err)
		goto unmap;

	at = ivs->base;
	ivshmem_add_map(ivs, "registers", pci_resource_start(pdev, BAR_REGS), regs, false);
	ivshmem_add_map(ivs, "state_table", at, ivs->state_table, true);
	at += ivs->state_table;
	ivshmem_add_map(ivs, "rw_section", at, ivs->rw, false);
	at += ivs->rw;
	ivshmem_add_map(ivs, "input_sections", at, ivs->output * ivs->max_peers, true);
	ivshmem_add_map(ivs, "output_section", at + ivs->id * ivs->output, ivs->output, false);

	err = ivshmem_one_shot(ivs, cap);
	if (err)
		goto unclaim;
	pci_set_master(pdev); /* MSI-X is not delivered without */
	err = ivshmem_request_irqs(ivs);
	if (err)
		goto clear_master;

	ivs->info.version = "1";
	ivs->info.irq = UIO_IRQ_CUSTOM;
	ivs->info.open = ivshmem_open;
	ivs->info.release = ivshmem_release;
#ifdef UIO_HAS_MMAP_PREPARE
	ivs->info.mmap_prepare = ivshmem_mmap_prepare;
#else
	ivs->info.mmap = ivshmem_mmap;
#endif
	err = uio_register_device(dev, &ivs->info);
	if (err) {
		dev_err(dev, "register with UIO: %d\n", err);
		goto free_irqs;
	}
	pci_set_drvdata(pdev, ivs);
	dev_info(dev, "peer %u of %u, %s, shared memory at 0x%llx, 0x%llx bytes\n", ivs->id, ivs->max_peers,
		 ivs->vectors ? "MSI-X" : "INTx", ivs->base, ivs->total);
	return 0;

free_irqs:
	ivshmem_free_irqs(ivs);
clear_master:
	pci_clear_master(pdev);
unclaim:
	release_mem_region(ivs->base, ivs->total);
unmap:
	pci_iounmap(pdev, ivs->regs);
release_regs:
	pci_release_region(pdev, BAR_REGS);
disable:
	pci_disable_device(pdev);
	return err;
}

static void ivshmem_remove(struct pci_dev *pdev)
{
	struct ivshmem *ivs = pci_get_drvdata(pdev);

	/* Before UIO frees what the handler wakes. */
	ivshmem_free_irqs(ivs);
	/* Ends blocked readers; from here on no file is opened or released. */
	uio_unregister_device(&ivs->info);
	/* A program that is still there cannot be told from a present peer. */
	if (ivs->files)
		writel(0, ivs->regs + REG_STATE);
	writel(0, ivs->regs + REG_INT_CONTROL);
	pci_clear_master(pdev);
	release_mem_region(ivs->base, ivs->total);
	pci_iounmap(pdev, ivs->regs);
	pci_release_region(pdev, BAR_REGS);
	pci_disable_device(pdev);
}

/*
 * Only the undefined protocol (class FF0000) is bound by itself: no driver of
 * the kernel can claim it, and what is to be done with it only a program
 * knows. All others are bound by driver_override.
 */
static const struct pci_device_id ivshmem_ids[] = {
	{ PCI_DEVICE(IVSHMEM_VENDOR, IVSHMEM_DEVICE), .class = 0xff0000, .class_mask = 0xffffff },
	{}
};
MODULE_DEVICE_TABLE(pci, ivshmem_ids);

static struct pci_driver ivshmem_driver = {
	.name = DRV_NAME,
	.id_table = ivshmem_ids,
	.probe = ivshmem_probe,
	.remove = ivshmem_remove,
};
module_pci_driver(ivshmem_driver);

MODULE_DESCRIPTION("ivshmem v2 PCI device for user space");
MODULE_AUTHOR("the ivshmem authors");
MODULE_LICENSE("GPL");
MODULE_VERSION("1.0");
